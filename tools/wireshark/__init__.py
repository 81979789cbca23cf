"""Makes a Wireshark dissector for ggml RPC from the declarations that this project reads it by.

``tables`` writes what is declared (structs, commands of each version, ops, types) as Lua tables;
``reading.lua`` finds messages in streams by them, ``showing.lua`` shows these to Wireshark.
"""
