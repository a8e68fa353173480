"""Generated from proto/preceptor/v1 by scripts/generate_stubs.sh; do not edit."""
