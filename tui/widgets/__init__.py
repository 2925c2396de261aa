"""The parts that the screens are made of; none of them decides anything about models or requests."""
