"""What a run did and cost, as data."""
