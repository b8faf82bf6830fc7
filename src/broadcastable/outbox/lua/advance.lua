-- Ack the frozen frame and claim the next one, or finish the stream. KEYS: queue, state.
-- ARGV: the six of ack.lua, then the five of claim.lua.
-- Returns {1 when this call acked it, what claim.lua returns}.
local queue, state = KEYS[1], KEYS[2]
local acked = ack(queue, state, unpack(ARGV, 1, 6))
local claimed = claim(queue, state, unpack(ARGV, 7))
-- Only a delay that ends between the two looks at the clock leaves something.
if not claimed and finish(queue, state, ARGV[7]) == 1 then claimed = claim(queue, state, unpack(ARGV, 7)) end
return {acked, claimed}
