"""Agents that schedule, and the command line `llmsched`."""
