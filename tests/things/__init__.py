"""Migrations of a table for tests of what every database has in common."""
