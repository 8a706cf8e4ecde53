"""Identities, rosters and enrolment: who speaks, and who is believed. Pure; people decide
elsewhere.
"""
