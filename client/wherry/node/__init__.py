"""A node on this host: nats-server and every service, kept alive by one small supervisor (`wherry up`)."""
