"""The apparatus: arms, benches, comparison with the release, pictures, recorded logs. Training imports none of it."""
