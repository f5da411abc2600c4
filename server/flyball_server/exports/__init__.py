"""Runs that leave the service and come back: the export file, tables, schedules.

Rule of this package: what leaves says whence it came, and what comes in is proved before it is believed.
"""
