"""What people see of a server: logs, statistics, the console, Prometheus."""
