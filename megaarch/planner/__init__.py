"""Layouts before they are run: memory, time and cost of each, and a dry run of one."""
