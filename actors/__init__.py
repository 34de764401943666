"""The body: Ray actors, the transports between them, and the controller that starts and watches."""
