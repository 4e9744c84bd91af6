"""What this machine can do, and how close code comes to it: timing, measured ceilings, roofline, reports."""
