"""Data access: functions that take a session first, keyword-only arguments after it, and never commit."""
