"""What a run needs, before there are any devices."""
