"""What several tests share: tiny models, a device that the CPU plays, other runtimes. Read models.py first."""
