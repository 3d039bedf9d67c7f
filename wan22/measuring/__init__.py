"""What `wan22 bench` measures, piece by piece."""
