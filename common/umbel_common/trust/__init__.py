"""Who speaks and who is believed: identities, rosters, enrolment. Pure; people decide elsewhere."""
