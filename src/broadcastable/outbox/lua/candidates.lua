-- Streams to look at, from one shard of the index. KEYS: active, idle. ARGV: up to which time or '' for now, how many.
-- Returns {that time, streams of active, streams of idle}.
local upto = ARGV[1] ~= '' and ARGV[1] or text(now_ms())
return {
  upto,
  redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', upto, 'LIMIT', 0, ARGV[2]),
  redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', upto, 'LIMIT', 0, ARGV[2]),
}
