"""Several processes on one video: who has which part, who this one is, and that all end together."""
