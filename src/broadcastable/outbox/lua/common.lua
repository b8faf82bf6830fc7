-- What all scripts share. Each works on the keys of one stream: its queue (a list) and its state (a hash).
--
-- An element of the queue is a batch, or a part of one that its writer found too large for a frame:
--   8 bytes  put at, ms, double      by this server's clock, added by push.lua
--   8 bytes  created at, ms, double  by the writer's clock
--   1 byte   1 when the batch ends here, 0 when its next part follows
--   4 bytes  number of events, then 4 bytes for the length of each
--   then what Lua never reads: the batch's id, txid and trace, and the events. All numbers are big-endian.
--
-- Fields of the state:
--   epoch, seq        the producer's, of the frozen frame or the next one
--   skip              events at the head of the queue's first element that are acked
--   count, elements   events and queue elements of the frozen frame; absent when none is
--   done, rest        what its ack removes: whole elements, and the skip that then holds
--   ends              batches that end within it
--   anchor            an offset from before the frame
--   lease, until      who claimed last, and to when
--   after             no claim before this time (ms)
--   parked            the error that parked the stream
--   woken             when a wake-up was asked for or a claim given; absent when no worker knows of the stream
--   batches, events   undelivered, for `pending` only
--
-- Turns: a transaction reserves its place before it commits (reserve.lua). `turns` is a sorted set of them by the time
-- of the reservation (us); `held` has, by turn, the elements that arrived while an earlier turn was open.

local ENDS_AT, COUNT_AT, LENGTHS_AT = 17, 18, 22

local function now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- Numbers as integers in text: Lua's own conversion would write 1.7e+12.
local function text(number)
  return string.format('%.0f', number)
end

local function ends(element)
  return element:byte(ENDS_AT) == 1
end

local function event_count(element)
  return (struct.unpack('>I4', element, COUNT_AT))
end

-- Walk the queue's elements from its head, a page at a time: a page is small at first and grows while elements are.
local function walk(queue, visit)
  local index, page, bytes = 0, 8, 0
  while true do
    local found = redis.call('LRANGE', queue, index, index + page - 1)
    for _, element in ipairs(found) do
      if not visit(element) then return end
      bytes = bytes + #element
    end
    if #found < page then return end
    index = index + page
    page = math.max(1, math.min(256, math.floor(524288 * index / bytes)))
  end
end

-- The first `count` events after `skip`: which elements hold them and what their ack removes.
local function measure(queue, skip, count)
  local cut = {elements = 0, done = 0, rest = 0, ends = 0}
  local left = count
  walk(queue, function(element)
    if left == 0 then return false end
    local here = event_count(element) - skip
    cut.elements = cut.elements + 1
    if here <= left then
      cut.done = cut.done + 1
      if ends(element) then cut.ends = cut.ends + 1 end
      left = left - here
      skip = 0
    else
      cut.rest = skip + left
      left = 0
    end
    return true
  end)
  return cut
end

local function freeze(state, count, cut)
  redis.call('HSET', state, 'count', count, 'elements', cut.elements, 'done', cut.done, 'rest', cut.rest,
    'ends', cut.ends)
end

-- Whether the frozen frame has this epoch and number; and how many events it holds.
local function is_current(state, epoch, seq)
  local held = redis.call('HMGET', state, 'epoch', 'seq', 'count')
  return held[1] == epoch and held[2] == seq and held[3] ~= false, tonumber(held[3] or 0)
end

-- The frozen frame as the client reads it, or false when none is.
local function frozen(queue, state)
  local held = redis.call('HMGET', state, 'epoch', 'seq', 'skip', 'count', 'anchor', 'elements')
  if not held[4] then return false end
  return {held[1], held[2], held[3] or '0', held[4], held[5], redis.call('LRANGE', queue, 0, held[6] - 1)}
end

-- The caller's own frame, as it is now.
local function own(state)
  return {'own', redis.call('HMGET', state, 'epoch', 'seq', 'count', 'anchor')}
end

-- Ask for a wake-up, unless one is queued, a worker is at work, or nothing may be claimed now. Returns 1 or 0.
local function ask(state, now)
  local held = redis.call('HMGET', state, 'woken', 'parked', 'after')
  if held[1] or held[2] or tonumber(held[3] or 0) > now then return 0 end
  redis.call('HSET', state, 'woken', text(now))
  return 1
end

-- The next place among the turns.
local function place(turns)
  local time = redis.call('TIME')
  local last = redis.call('ZRANGE', turns, -1, -1, 'WITHSCORES')[2]
  return text(math.max(time[1] * 1000000 + time[2], (last or 0) + 1))
end

-- The place of a batch that has none, or lost it by waiting: before the later turns of the same writer, or behind all.
-- `found` keeps the first of these for each writer: the batches of a script come in the order of their turns.
local function late_place(turns, turn, found)
  local writer = turn:match('^(.*):')
  if not writer then return place(turns) end
  local later = found[writer]
  if later == nil or (later and later.turn <= turn) then
    later = false
    local open = redis.call('ZRANGE', turns, 0, -1, 'WITHSCORES')
    for index = 1, #open, 2 do
      if open[index] > turn and open[index]:match('^(.*):') == writer then
        later = {turn = open[index], place = string.format('%.1f', open[index + 1] - 0.5)}
        break
      end
    end
    found[writer] = later
  end
  return later and later.place or place(turns)
end

-- Queue what `held` has of a turn. Returns whether it had anything.
local function unhold(queue, held, turn)
  local elements = redis.call('HGET', held, turn)
  if not elements then return false end
  local stamp = struct.pack('>d', now_ms())
  for _, element in ipairs(cmsgpack.unpack(elements)) do redis.call('RPUSH', queue, stamp .. element) end
  redis.call('HDEL', held, turn)
  return true
end

-- Queue what is held and no longer behind an open turn. A turn older than `patience` ms is waited for no more.
-- Returns whether anything was queued.
local function settle(queue, state, turns, held, patience)
  local now = now_ms()
  local queued = false
  while true do
    local first = redis.call('ZRANGE', turns, 0, 0, 'WITHSCORES')
    if not first[1] then break end
    if unhold(queue, held, first[1]) then
      queued = true
    elseif now - first[2] / 1000 < tonumber(patience) then
      break
    end
    redis.call('ZREM', turns, first[1])
  end
  if redis.call('EXISTS', turns) == 0 then
    -- Nothing is held without a turn, unless Redis threw the turns away when it ran out of memory.
    local left = redis.call('HKEYS', held)
    table.sort(left)
    for _, turn in ipairs(left) do queued = unhold(queue, held, turn) or queued end
  elseif redis.call('EXISTS', held) == 0 then
    -- Turns that hold nothing up go by themselves, with the processes that may have died; what is held never does.
    redis.call('PEXPIRE', turns, 10 * patience)
  end
  -- The state of an idle stream expires; that of one with something to deliver never does.
  if queued then redis.call('PERSIST', state) end
  return queued
end
