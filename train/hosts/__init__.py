"""Several processes: finding each other, agreeing, and noticing when one is gone."""
