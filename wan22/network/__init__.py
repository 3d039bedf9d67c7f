"""Repositories of weights: what they hold, where it goes, whether it is right."""
