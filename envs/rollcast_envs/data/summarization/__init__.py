"""Short texts of software documentation, each with the sentence that sums it up (licences: SOURCE.md)."""
