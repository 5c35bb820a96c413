"""What a person sees: report, status, tables, pictures."""
