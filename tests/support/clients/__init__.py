"""Clients that drive a real server: an attacker and a browser."""
