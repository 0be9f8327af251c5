"""What every Wherry process knows: contracts, values, errors and the bus."""
