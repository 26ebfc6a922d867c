"""The page for admins in a real browser, beside a real Synapse: see docs/admin-page.md."""
