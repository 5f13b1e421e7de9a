"""PEFT's file format, and smaller or approximately merged models."""
