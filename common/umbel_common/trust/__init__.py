"""Who speaks, and who is believed: identities, rosters, enrolment. No IO; people decide elsewhere."""
