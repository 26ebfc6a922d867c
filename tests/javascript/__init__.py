"""The ephemeral map beside that of matrix-js-sdk, which runs in Node; no Synapse."""
