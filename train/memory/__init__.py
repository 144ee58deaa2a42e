"""What a step needs on a device, read off the compiled program."""
