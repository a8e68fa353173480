"""The teacher: writes self-edits and learns from rewards (gRPC TeacherService)."""
