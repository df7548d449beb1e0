"""Opening a teacher, ours or another library's."""
