"""Engines and strategies for control."""
