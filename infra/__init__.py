"""How it runs elsewhere: deployments, containers and clusters, as files that the tools of the field read."""
