"""The tests, a package by name so that no other of that name is found for it."""
