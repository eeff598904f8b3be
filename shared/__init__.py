"""What two processes must agree on: messages, wire format, settings, errors, metric names, supervision."""
