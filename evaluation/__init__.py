"""Metrics, one file each, and the runner that makes images once and feeds every metric."""
