"""Health checks: asks the services themselves, and tells the service layer only what changes."""
