"""Health checks: connects to the services, and reports changes of their health to the engine."""
