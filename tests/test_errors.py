"""What every error that r2kit raises on purpose has in common."""
