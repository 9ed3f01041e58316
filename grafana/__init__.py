"""Dashboards, alert rules and provisioning for Prometheus and Grafana."""
