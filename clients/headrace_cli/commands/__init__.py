"""The commands, a module for each command or group of them: options in, calls of the client, results printed."""
