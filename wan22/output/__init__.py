"""What is beside the frames of a video: its record, its name, sheets."""
