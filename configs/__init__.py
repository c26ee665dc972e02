"""The YAML configs shipped with fastgen."""
