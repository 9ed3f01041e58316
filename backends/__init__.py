"""Inference engines as supervised child processes; never imports the proxy."""
