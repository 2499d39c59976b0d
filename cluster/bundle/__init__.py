"""What the job publishes and the application reads: manifest, objects, serving map."""
