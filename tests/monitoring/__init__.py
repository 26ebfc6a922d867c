"""What Prometheus and Grafana make of the metrics; `make test-monitoring` runs it."""
