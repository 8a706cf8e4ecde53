"""A site's side: it judges, trains, and sends what its own policy and ledger allow."""
