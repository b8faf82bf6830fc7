-- List streams as active in one shard of the index. KEYS: active. ARGV: the streams.
-- One that is listed already keeps the time of its next look.
local now = now_ms()
for _, stream in ipairs(ARGV) do redis.call('ZADD', KEYS[1], 'NX', now, stream) end
return 1
