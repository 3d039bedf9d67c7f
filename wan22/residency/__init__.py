"""Who is in which memory, and how it comes and goes."""
