"""Graders say whether an answer is right: exact match, words alone, a judge, and words first with a judge behind."""
