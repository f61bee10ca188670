"""What MLflow and git hosts call: a request is verified, and a flow run is created."""
